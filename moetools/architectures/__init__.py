"""Routers of any Mixture-of-Experts model of transformers.

Routers are found from the model itself. A file in this folder describes a family only where it
differs from the call `experts(hidden_states, top_k_index, top_k_weights)`; it defines
`ARCHITECTURE`.
"""

from moetools.architectures._discovery import find_routers, get_tensor
from moetools.architectures._refusals import REFUSED, refusal
from moetools.architectures._spec import (
    Architecture,
    Reader,
    RouterCall,
    RouterDiscovery,
    RouterModules,
    RouterSpec,
)

__all__ = [
    "REFUSED",
    "Architecture",
    "Reader",
    "RouterCall",
    "RouterDiscovery",
    "RouterModules",
    "RouterSpec",
    "find_routers",
    "get_tensor",
    "refusal",
]
