"""The shell of `core.batcher`: waiters, one timer, workers."""
