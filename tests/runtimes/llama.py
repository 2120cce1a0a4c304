"""A prebuilt llama.cpp, driven through its C interface: what tests/runtimes/gguf.py runs beside quantc.

The npm package @node-llama-cpp/linux-x64 ships libllama with a backend for each CPU; building llama.cpp would take half
an hour on two cores. Its version is pinned here, and with it where the fields of its parameters lie. `Runtime` is for the
Python of `environment`, which has numpy.
"""

import ctypes
import pathlib
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import venv

PACKAGE, VERSION = "@node-llama-cpp/linux-x64", "3.22.1"  # llama.cpp v0.5.0
PYTHON = ["numpy==2.4.6", "tokenizers==0.23.3"]
# Offsets in llama_context_params, and the defaults that must be found there.
CONTEXT, BATCH, MICROBATCH, THREADS, BATCH_THREADS, FLASH, KEY_TYPE, VALUE_TYPE, EMBEDDINGS = 0, 4, 8, 28, 32, 52, 104, 108, 128
DEFAULTS = {CONTEXT: 512, BATCH: 2048, MICROBATCH: 512, FLASH: -1, KEY_TYPE: 1, VALUE_TYPE: 1}
# And in llama_model_quantize_params.
FILE_TYPE, ALLOW_REQUANTIZE = 4, 16


def say(text):
    print(text, file=sys.stderr, flush=True)


def libraries(folder):
    """The folder with libllama, installed by npm if it is not there."""
    found = folder / f"llama-{VERSION}"
    if not found.exists():
        say(f"installing {PACKAGE} {VERSION} into {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            command = ["npm", "install", "--prefix", scratch, "--no-save", "--ignore-scripts", "--no-audit", "--no-fund", f"{PACKAGE}@{VERSION}"]
            subprocess.run(command, check=True, stdout=sys.stderr)
            shutil.move(pathlib.Path(scratch, "node_modules", PACKAGE, "bins", "linux-x64"), found)
    return found


def environment(folder):
    """The Python of a venv with what the worker imports."""
    python, done = folder / "bin" / "python", folder / "installed.txt"
    if not done.exists() or done.read_text().split() != PYTHON:
        say(f"installing into {folder}: {', '.join(PYTHON)}")
        if not python.exists():
            venv.create(folder, with_pip=True)
        # Without dependencies: tokenizers names a client of the Hugging Face hub, which reading a file does not need.
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps", *PYTHON]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        done.write_text("\n".join(PYTHON))
    return python


class Parameters(ctypes.Structure):
    """Any of llama.cpp's structures of parameters: read and written by offset, as long as the longest.

    Passed by value it lies on the stack, where a callee takes as many bytes as it knows of.
    """

    _fields_ = [("bytes", ctypes.c_uint8 * 512)]

    def get(self, at):
        return struct.unpack_from("<i", self.bytes, at)[0]

    def set(self, at, value):
        struct.pack_into("<i", self.bytes, at, value)


class Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


def load(folder):
    """libllama with the backend for this CPU, and its functions' types."""
    for name in ("libggml-base", "libggml", "libllama"):
        # A build of one's own has no version in these names.
        [file] = [file for end in (".so", ".v*.so") for file in pathlib.Path(folder).glob(name + end)]
        library = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
        if name == "libggml":
            library.ggml_backend_load_all_from_path.argtypes = [ctypes.c_char_p]
            library.ggml_backend_load_all_from_path(str(folder).encode())
    pointer, integer, text = ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p
    integers = ctypes.POINTER(ctypes.c_int32)
    for name, result, arguments in [
        ("llama_model_default_params", Parameters, []),
        ("llama_context_default_params", Parameters, []),
        ("llama_model_quantize_default_params", Parameters, []),
        ("llama_model_quantize", ctypes.c_uint32, [text, text, ctypes.POINTER(Parameters)]),
        ("llama_model_load_from_file", pointer, [text, Parameters]),
        ("llama_init_from_model", pointer, [pointer, Parameters]),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", integer, [pointer]),
        ("llama_vocab_get_add_bos", ctypes.c_bool, [pointer]),
        ("llama_vocab_bos", integer, [pointer]),
        ("llama_vocab_is_eog", ctypes.c_bool, [pointer, integer]),
        ("llama_tokenize", integer, [pointer, text, integer, integers, integer, ctypes.c_bool, ctypes.c_bool]),
        ("llama_detokenize", integer, [pointer, integers, integer, text, integer, ctypes.c_bool, ctypes.c_bool]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, ctypes.c_bool]),
        ("llama_decode", integer, [pointer, Batch]),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), [pointer]),
        ("llama_get_embeddings_seq", ctypes.POINTER(ctypes.c_float), [pointer, integer]),
        ("llama_model_n_embd", integer, [pointer]),
    ]:
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    library.llama_backend_init()
    return library


def dequantize(library, source, target):
    """Writes what llama.cpp itself holds `source` to mean, in f32."""
    parameters = library.llama_model_quantize_default_params()
    parameters.set(FILE_TYPE, 0)  # all F32
    parameters.bytes[ALLOW_REQUANTIZE] = 1
    if code := library.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama_model_quantize of {source} to F32 returned {code}")


class Runtime:
    """One model in llama.cpp, on the CPU, with its defaults: a KV cache of f16 among them, unless `exact`.

    Attention to a choice of tokens may need flash attention, whose sums are as exact where keys and values are f32: `flash`.
    """

    def __init__(self, library, path, context, threads, exact=False, flash=False, embeds=False):
        self.lib = library
        self.model = library.llama_model_load_from_file(str(path).encode(), library.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        parameters = library.llama_context_default_params()
        for at, default in DEFAULTS.items():
            if parameters.get(at) != default:
                raise RuntimeError(f"llama_context_params: {parameters.get(at)} at offset {at}, not {default}: another version of llama.cpp")
        for at, value in {CONTEXT: context, BATCH: context, THREADS: threads, BATCH_THREADS: threads}.items():
            parameters.set(at, value)
        if exact:
            for at in (FLASH, KEY_TYPE, VALUE_TYPE):  # flash attention adds up in f16
                parameters.set(at, 0)
        if flash:
            parameters.set(FLASH, 1)
        parameters.bytes[EMBEDDINGS] = embeds
        self.context = library.llama_init_from_model(self.model, parameters)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context for {path}")
        self.vocab = library.llama_model_get_vocab(self.model)
        self.vocabulary = library.llama_vocab_n_tokens(self.vocab)
        self.bos = library.llama_vocab_bos(self.vocab) if library.llama_vocab_get_add_bos(self.vocab) else None

    def tokenize(self, text, special=False):
        """Ids of a text; `special` puts the model's BOS before it."""
        data = text.encode()
        room = len(data) + 16
        ids = (ctypes.c_int32 * room)()
        count = self.lib.llama_tokenize(self.vocab, data, len(data), ids, room, special, False)
        if count < 0:
            raise RuntimeError(f"llama.cpp wants room for {-count} tokens")
        return list(ids[:count])

    def text(self, ids):
        room = 64 * len(ids) + 64
        data = ctypes.create_string_buffer(room)
        count = self.lib.llama_detokenize(self.vocab, (ctypes.c_int32 * len(ids))(*ids), len(ids), data, room, False, True)
        return data.raw[:count].decode(errors="replace")

    def forget(self):
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)

    def logits(self, ids, start, first):
        """Decode `ids` as positions from `start`; log-odds [len(ids) − first, vocabulary] after those from `first`."""
        import numpy

        count = len(ids)
        one = (ctypes.c_int32 * 1)(0)
        batch = Batch(
            count,
            (ctypes.c_int32 * count)(*ids),
            None,
            (ctypes.c_int32 * count)(*range(start, start + count)),
            (ctypes.c_int32 * count)(*[1] * count),
            (ctypes.POINTER(ctypes.c_int32) * count)(*[one] * count),
            (ctypes.c_int8 * count)(*[int(i >= first) for i in range(count)]),
        )
        if code := self.lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        rows = self.lib.llama_get_logits(self.context)
        if not rows:
            return None
        return numpy.ctypeslib.as_array(rows, (count - first, self.vocabulary)).astype(numpy.float64)

    def embedding(self, ids):
        """What llama.cpp makes of the hidden states of all `ids` by the way that the file names, [width]."""
        import numpy

        self.forget()
        self.logits(ids, 0, 0)
        pooled = self.lib.llama_get_embeddings_seq(self.context, 0)
        if not pooled:
            raise RuntimeError("llama.cpp makes no embedding: the file names no way")
        return numpy.ctypeslib.as_array(pooled, (self.lib.llama_model_n_embd(self.model),)).astype(numpy.float64)

    def losses(self, ids, first):
        """Negative log-likelihoods of the tokens after positions `first` and up, each given all before it."""
        import numpy

        self.forget()
        logits = self.logits(ids, 0, first)[:-1]
        logits -= logits.max(-1, keepdims=True)
        return numpy.log(numpy.exp(logits).sum(-1)) - logits[range(len(logits)), ids[first + 1 :]]

    def greedy(self, prompt, count):
        """Up to `count` ids that follow `prompt`, the likeliest each time; ends where the model does."""
        self.forget()
        found, start, ids = [], 0, prompt
        while len(found) < count:
            best = int(self.logits(ids, start, len(ids) - 1)[0].argmax())
            if self.lib.llama_vocab_is_eog(self.vocab, best):
                break
            start, ids = start + len(ids), [best]
            found.append(best)
        return found
