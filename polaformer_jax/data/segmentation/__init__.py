"""Semantic segmentation: images with a class for every pixel.

A record is `{"image": encoded bytes, "mask": encoded bytes (PNG)}`. Labels are uint8, and 255 marks pixels without one.
Resizing and colours are those of OpenCV, which the official pipelines (mmsegmentation) use.
"""
