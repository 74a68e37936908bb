"""Bit allocation as a multiple-choice knapsack, and the solvers for it."""
