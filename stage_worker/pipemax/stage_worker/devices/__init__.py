"""Where a stage computes. Nothing outside this package asks whether a device is a GPU."""
