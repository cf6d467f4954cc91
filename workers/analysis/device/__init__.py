"""The way of a frame that never leaves the device: upload, resize, detect, cut, classify; only faces come back."""
