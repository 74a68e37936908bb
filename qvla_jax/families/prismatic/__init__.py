"""Prismatic policies: OpenVLA, OpenVLA-OFT, UniVLA, and small ones of their kind."""
