"""How a base model is read: what the adapters in `integrations/` build on.

`base` says what an adapter answers; `wan` and `wan_counted` are skeletons for the many models that descend
from Wan; `rope` rotates keys and queries as the base model does; `host_cache` frees its KV cache and gives it
back.
"""
