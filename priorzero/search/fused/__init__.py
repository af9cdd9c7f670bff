"""The fast form of a search: walking, network and backup without Python per root or node.

| file | what it is |
| --- | --- |
| `rule.py` | which children a walk takes, as numbers that a kernel reads |
| `cpu_kernels.py` | walking and backup compiled for the CPU (numba) |
| `cpu.py` | a search on the CPU: those kernels and the fused network by turns |
| `cuda_kernels.py` | walking and backup as Triton kernels, one program per root |
| `cuda_network_kernels.py` | the network between two walks, as Triton kernels |
| `cuda_network.py` | those kernels in the order of a simulation |
| `cuda_graph.py` | capturing work of a GPU, and what it begins with |
| `cuda_roots.py` | the network's look at the roots, captured |
| `cuda.py` | a search on a GPU: all of its simulations captured in one CUDA graph |

The reference is `priorzero/search/tree.py` with `rules.py` and the root policies beside it; the
kernels make the same choices, ties included (tests/search/test_fused.py). The network's part is
`priorzero/world_model/fused.py`; on a GPU `cuda_network.py` computes the same in fewer kernels.
"""
