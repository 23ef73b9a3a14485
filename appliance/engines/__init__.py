"""The engines that run models; imported only by workers, building and tools."""
