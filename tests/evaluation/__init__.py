"""Tests of edgelm.evaluation. A package, so that they can import helpers of the parity tests."""
