"""The two halves of the app of fakes, as Flower's processes import them."""

from __future__ import annotations

from flower_makers import read_site, serve

from miram.finetune.federate.flower_wire import client_app, server_app

server = server_app(serve)
client = client_app(read_site)
