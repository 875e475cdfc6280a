"""A server process around eSpeak NG: pickled requests on standard input, samples and events on standard output.

eSpeak NG draws random numbers (aspiration, flutter) from a state that persists between utterances. To make every
utterance reproducible, the server never synthesises speech itself. It forks a child for each request, which sets the
seed first. The server imports only the standard library and espeakng_loader, because a small process forks faster.
"""

import ctypes
import os
import pickle
import sys

import espeakng_loader

# From espeak-ng's speak_lib.h.
WORD_EVENT, PHONEME_EVENT = 1, 7
_EVENT_END_OF_LIST = 0
_AUDIO_OUTPUT_SYNCHRONOUS = 2
_PHONEME_EVENTS, _DONT_EXIT = 0x0001, 0x8000
_RATE, _PITCH = 1, 3
_POS_CHARACTER = 1
_CHARS_UTF8 = 1


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # in characters, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    ]


# int callback(short *samples, int number, espeak_EVENT *events)
_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def open_library() -> tuple[ctypes.CDLL, int]:
    """Initialise eSpeak NG; return the library and the rate of its samples in Hz."""
    library = ctypes.CDLL(espeakng_loader.get_library_path())
    integer, unsigned, text, pointer = ctypes.c_int, ctypes.c_uint, ctypes.c_char_p, ctypes.c_void_p
    library.espeak_Initialize.argtypes = [integer, integer, text, integer]
    library.espeak_SetVoiceByName.argtypes = [text]
    library.espeak_SetParameter.argtypes = [integer, integer, integer]
    library.espeak_SetSynthCallback.argtypes = [_Callback]
    library.espeak_SetSynthCallback.restype = None
    library.espeak_ng_SetRandSeed.argtypes = [ctypes.c_long]
    size = ctypes.c_size_t
    library.espeak_Synth.argtypes = [text, size, unsigned, integer, unsigned, unsigned, pointer, pointer]
    data = espeakng_loader.get_data_path().encode()
    return library, library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, data, _PHONEME_EVENTS | _DONT_EXIT)


def synthesise(library: ctypes.CDLL, text: str, voice: str, rate: int, pitch: int, seed: int) -> tuple[bytes, list]:
    """Synthesise a text, once in a process: a second call would continue from the first one's random state.

    Args:
        library: from `open_library`.
        voice: name of an eSpeak NG voice, such as "gmw/en-US+m3".
        rate: words per minute.
        pitch: 0 to 100.
        seed: of eSpeak NG's random numbers.

    Returns:
        16-bit samples as bytes, and a list of events (type, position in the text from 0, time in ms, phoneme name).

    Raises:
        ValueError: eSpeak NG rejects the voice or the text.
    """
    pcm, events = [], []

    def collect(samples, number, event) -> int:
        if samples and number:
            pcm.append(ctypes.string_at(samples, 2 * number))
        i = 0
        while event[i].type != _EVENT_END_OF_LIST:
            events.append((event[i].type, event[i].text_position - 1, event[i].audio_position, event[i].name))
            i += 1
        return 0

    callback = _Callback(collect)
    library.espeak_SetSynthCallback(callback)
    library.espeak_ng_SetRandSeed(seed)
    encoded = text.encode()
    codes = (
        library.espeak_SetVoiceByName(voice.encode()),
        library.espeak_SetParameter(_RATE, rate, 0),
        library.espeak_SetParameter(_PITCH, pitch, 0),
        library.espeak_Synth(encoded, len(encoded) + 1, 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None),
    )
    if any(codes):
        raise ValueError(
            f"eSpeak NG cannot synthesise {text!r} with {voice} at {rate} words per minute (codes {codes}): use "
            "another text or voice."
        )
    return b"".join(pcm), events


def _serve() -> None:
    library, sample_rate = open_library()
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    pickle.dump(sample_rate, answers)
    answers.flush()
    while True:
        try:
            request = pickle.load(requests)
        except EOFError:
            return
        child = os.fork()
        if child == 0:
            try:
                answer = synthesise(library, **request)
            except ValueError as error:
                answer = error
            pickle.dump(answer, answers)
            answers.flush()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            pickle.dump(ValueError(f"eSpeak NG crashed on {request} (status {status}): reword the sentence."), answers)
            answers.flush()


if __name__ == "__main__":
    _serve()
