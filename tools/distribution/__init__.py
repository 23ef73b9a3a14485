"""Makes what is handed to an administrator: the Debian package, its manual pages and completions.

`make deb` drives it; nothing here is imported by the appliance.
"""
