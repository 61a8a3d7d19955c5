"""Mechanisms that change what an observer learns: masking matrices and their error bounds."""
