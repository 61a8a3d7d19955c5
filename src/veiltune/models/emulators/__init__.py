"""Emulators of the trunk: what a provider gives away so that an owner can tune without it.

*Reference.* Xiao, Lin and Han 2023 (offsite-tuning, arXiv 2302.04870): the owner tunes bottom and top against a smaller stand-in
for the trunk, which is then put back. `options` says which stand-in, `build` and `distil` make it at the provider, `card`
describes it on the wire, `blocks` and `linears` run it at the owner. The names stay in the modules, so that the options can be
read without loading torch.
"""
