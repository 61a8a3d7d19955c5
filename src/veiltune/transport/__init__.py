"""Typed messages between parties, as bytes, over one seam.

`messages` says what may be said, `fields`, `frame` and `codec` how it looks as bytes, `channel` who may say it to whom,
`stream` and `shared_memory` how it travels, and `transcript` what is kept of it.
"""
