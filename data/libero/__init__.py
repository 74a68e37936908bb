"""LIBERO: demonstration files, the simulator that renders them, and the RLDS builder."""
