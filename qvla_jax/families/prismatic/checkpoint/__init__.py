"""The public directories of OpenVLA, OpenVLA-OFT and UniVLA."""
