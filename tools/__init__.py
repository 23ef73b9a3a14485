"""Commands for the developer's desk, each a file that runs on its own: `python tools/<name>.py --help`.

A package only so that tests can import their parts; the appliance itself never imports it.
"""
