"""Faster R-CNN as in the paper: the detector, its data, its training and its figures."""
