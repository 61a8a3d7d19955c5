"""Typed messages between parties, as bytes, over one seam.

`messages` says what may be said, `fields`, `frame` and `codec` how it looks as bytes, `channel` who may say it to whom,
`stream`, `secure_channel` and `shared_memory` how it travels, `identity`, `secure` and `refusals` how two machines' parties
prove themselves first, and `transcript` what is kept of it.
"""
