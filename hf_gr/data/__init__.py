"""Datasets of images, text and instructions, from the Hub, a folder, or embedded."""
