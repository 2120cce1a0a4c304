from typing import Any, Callable, Optional, Tuple

__all__ = ["__version__", "run"]
__version__: str

def run(command: str, asked: str, callback: Optional[Callable[[str, float, Optional[float]], Any]]) -> Tuple[int, str]: ...
