"""The compressors that every law is tried on. A new strategy adds a line; a test fails if it is forgotten."""

from __future__ import annotations

KEEP = 5

SPECS = {
    "divprune": "divprune:keep=5",
    "fastervlm": "fastervlm:keep=5",
    "fastervlm-last": "fastervlm:keep=0.3,layer=-1,positions=original",
    "fastervlm-received": "fastervlm:keep=5,saliency=received",
    "globalcom2": "globalcom2:keep=5",
    "globalcom2-code": "globalcom2:keep=9,formula=code,positions=original",
    "globalcom2-mean": "globalcom2:keep=0.3,saliency=mean,formula=zscore",
    "holitom": "holitom:keep=5",
    "holitom-published": "holitom:keep=0.3,fill=False",
    "holitom-static": "holitom:keep=6,tau=-1.0,positions=original",
    "none": "none",
    "pool": "pool:keep=6",
    "pool-overlap": "pool:keep=9,positions=original",
    "random": "random:keep=5,seed=3",
    "todre": "todre:keep=5",
    "todre-k-center": "todre:keep=5,objective=k-center,positions=original",
    "todre-received": "todre:keep=5,pivot=received",
    "uniform": "uniform:keep=5",
    "vtc-cls": "vtc-cls:keep=5,start=0",
    "vtc-cls-original": "vtc-cls:keep=5,start=0,positions=original",
}

DROPPING = {name: spec for name, spec in SPECS.items() if name != "none"}

# Strategies inside the language model.
DECODER_SPECS = {
    "fastv": "fastv:keep=5,layer=1",
    "fastv-truncate": "fastv:keep=0.3,truncate=True",
    "holitom-inner": "holitom-inner:keep=5",
    "holitom-inner-mean": "holitom-inner:keep=5,layer=1,merge=mean",
    "pyramiddrop": "pyramiddrop:keep=5,stages=2",
    "pyramiddrop-original": "pyramiddrop:keep=5,stages=1,positions=original",
    "todre-inner": "todre-inner",
    "todre-inner-tau": "todre-inner:tau=0.999",
}

# Several at once: each sees what the one before it left.
COMPOSED = {
    "uniform+fastv": ("uniform:keep=9", "fastv:keep=4,layer=2"),
    "pool+pyramiddrop": ("pool:keep=9", "pyramiddrop:keep=3,stages=2"),
    "todre+todre-inner": ("todre:keep=6", "todre-inner"),
}
