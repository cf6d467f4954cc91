"""Analyses frames in a GPU's memory: upload, resize, detect, cut, classify; only the faces are downloaded."""
