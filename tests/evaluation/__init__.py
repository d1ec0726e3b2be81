"""Tests of edgelm.evaluation; a package, so that they share what the parity tests have."""
