"""fleetgym: environments, agents, policy merging and benchmarks for robot learning.

Importing it registers the environments with Gymnasium; it prints nothing and imports neither torch nor MuJoCo.
"""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout the parts lie beside src/ (envs/, agents/, ...); in a wheel they are inside the package already.
_root = _Path(__file__).resolve().parents[2]
if (_root / "pyproject.toml").is_file() and (_root / "envs" / "__init__.py").is_file():
    __path__.append(str(_root))

from fleetgym.envs import register_envs as _register_envs  # noqa: E402

_register_envs()
