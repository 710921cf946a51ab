"""Algorithms: pure functions from (problem, topology, rank, parameters) to the steps of that rank."""
