"""answer.h by ctypes, as an app of any language calls a shared library of answer.c."""

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_double, c_int, c_size_t, c_void_p
from pathlib import Path


class Choice(Structure):
    _fields_ = [("text", c_char_p), ("logprob", c_double)]


class Result(Structure):
    _fields_ = [("most", c_size_t), ("best", c_size_t), ("trim", c_int), ("text", c_char_p),
                ("logprob", c_double), ("choices", POINTER(Choice)), ("found", c_size_t),
                ("prompt_tokens", c_size_t), ("tokens", c_size_t), ("steps", c_size_t),
                ("first_token", c_double)]


class App:
    """A folder, opened by a shared library of answer.c. Raises ValueError with the error's line."""

    def __init__(self, library: Path, folder: Path, threads: int = 1):
        self.c = ctypes.CDLL(str(library))
        self.c.open_answer.restype, self.c.answer_error.restype = c_void_p, c_char_p
        self.handle = c_void_p(self.c.open_answer(str(folder).encode(), threads))
        self.result = Result()
        self.raise_error()

    def raise_error(self) -> None:
        if error := self.c.answer_error(self.handle):
            raise ValueError(error.decode())

    def ask(self, question: str, task: str | None = None, best: int = 0, most: int = 0) -> str:
        self.result.best, self.result.most = best, most
        self.c.ask_answer(self.handle, question.encode(), task and task.encode(),
                          byref(self.result))
        self.raise_error()
        return bytes(self.result.text).decode()

    def choose(self, question: str, best: int, task: str | None = None) -> list[tuple[str, float]]:
        self.ask(question, task, best)
        return [(choice.text.decode(), choice.logprob)
                for choice in self.result.choices[:self.result.found]]

    def close(self) -> None:
        self.c.close_answer(self.handle)
