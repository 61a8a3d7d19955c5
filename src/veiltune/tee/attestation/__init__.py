"""Attestation: evidence of trusted hardware, how it is collected, and how it is verified against a policy.

What is verified fails closed: verification returns a description of what it verified, or raises `AttestationError`.
"""
