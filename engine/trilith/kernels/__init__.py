"""What runs on the hot path: random streams (`stream`), the plain-torch truth of each op (`reference`), and `ops`.

Layers import `ops` only. `reference` says what an op means and serves wherever nothing faster can.
"""
