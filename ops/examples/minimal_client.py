"""Two requests to a running PipeMax system with nothing but ZeroMQ and MessagePack.

    python minimal_client.py ipc://RUN_DIRECTORY/ingest.sock

`pipemax status` shows the run directory. Every message is one frame: a map with the key `type`.
"""

import sys

import msgpack
import zmq

with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
    socket.linger = 0
    socket.rcvtimeo = 60_000
    socket.connect(sys.argv[1])

    def send(**message):
        socket.send(msgpack.packb(message))

    def receive():
        return msgpack.unpackb(socket.recv())

    send(type="client_hello", protocol=1, client="minimal")
    server = receive()
    print("connected to", server["model_name"], "at most", server["credits"], "requests at once")

    greedy = {"temperature": 0.0, "max_tokens": 16}
    send(type="submit", request_id="text", prompt="Water has no plan.", sampling=greedy)
    send(type="submit", request_id="ids", prompt_token_ids=[5, 6, 7], sampling=greedy)
    for _ in range(2):
        answer = receive()  # `finished`, or `refused` with a code and a message
        print(answer["request_id"], answer["type"], answer.get("text", answer.get("message")))
