"""Where the embedded model and data lie. `demo/README.md` tells what they are and how they were made."""

from pathlib import Path

MODEL_FOLDER = Path(__file__).parent / "model"
TASK_FOLDER = Path(__file__).parent / "data" / "task"
TEXT_FOLDER = Path(__file__).parent / "data" / "text"
