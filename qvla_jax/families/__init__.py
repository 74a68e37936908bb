"""Families of policies: each folder has its configuration, network, checkpoints and processor."""
