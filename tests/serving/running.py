"""``mtnlg serve`` with a tiny model, in a thread of the tests."""

import threading

from tests.generation.test_dialogue import TEMPLATES, model, tokenizer

from mtnlg.config.generation import EngineConfig
from mtnlg.config.serving import ServerConfig
from mtnlg.generation.dialogue_format import choose_format
from mtnlg.serving.backend import Backend
from mtnlg.serving.lifecycle import Server

CHAT, BASE = "default", "persona"


class Running:
    """``mtnlg serve`` in a thread, with a model that knows nothing."""

    def __init__(self, style, **settings):
        words = tokenizer(TEMPLATES[style])
        form = choose_format(words)
        config = EngineConfig(max_batch_size=4, compile="off")
        self.backend = Backend.of_model(model(512), words, "tiny", form, config)
        settings = {"port": 0, "drain_timeout_seconds": 0, "log_format": "json", **settings}
        self.server = Server(ServerConfig(**settings), lambda: self.backend)
        self.thread = threading.Thread(target=self.server.run, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.stop()
        self.thread.join(60)
        assert not self.thread.is_alive()
