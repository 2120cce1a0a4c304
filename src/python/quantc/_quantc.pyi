from typing import Any, Callable, Optional, Tuple

__version__: str

def run(command: str, asked: str, callback: Optional[Callable[[str, float, Optional[float]], Any]]) -> Tuple[int, str]: ...
