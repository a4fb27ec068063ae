"""What setup.py needs to build the kernels; nothing of it is installed."""
