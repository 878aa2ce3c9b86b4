"""The network below :mod:`fleetgym.merging.federated`: Flower's SuperLink and SuperNode, each inside our own process.

Flower's two long-lived programs are ``flower-superlink`` and ``flower-supernode``. Started as they are, they would
(a) ship the training program to the robots as a bundle and run what arrives, (b) begin a new process, and import
torch, for every message, and (c) open their control interface, which has no login of its own, on the port that robots
connect to: whoever reaches it can register a key or submit a program. So ``fleetgym fleet`` uses the parts that those
programs are made of and leaves the rest out: the server serves Flower's Fleet API (its routes, its link state, its
node authentication) and nothing else, and a robot speaks it through Flower's client and runs only what is installed
on it. Messages, records, TLS and signatures are Flower's.

These parts are not Flower's public interface and move between its releases, hence the narrow version range of the
extra ``fleet``; no other file imports them. :mod:`fleetgym.merging.federated` needs public names only, so its Strategy
and ClientApp also run under Flower's own programs.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from fleetgym.core.errors import UserError
from fleetgym.core.optional import require

try:
    import httpx
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key
    from flwr.app import Context, Error, Message, RecordDict
    from flwr.app.message import make_message, remove_content_from_message
    from flwr.clientapp import ClientApp
    from flwr.common.constant import NOOP_ACCOUNT_NAME, NOOP_FLWR_AID, SUPERLINK_NODE_ID, ErrorCode
    from flwr.common.serde import message_from_proto, message_to_proto
    from flwr.proto.fleet_pb2 import (
        ActivateNodeRequest,
        DeactivateNodeRequest,
        PullMessagesRequest,
        PushMessagesRequest,
        RegisterNodeFleetRequest,
    )
    from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
    from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
    from flwr.proto.node_pb2 import Node, NodeInfo
    from flwr.serverapp import Grid
    from flwr.supercore.constant import NOOP_FEDERATION_ID, TaskType
    from flwr.supercore.inflatable.inflatable_object import (
        get_all_nested_objects,
        get_object_tree,
        iterate_object_tree,
        no_object_id_recompute,
    )
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
    from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
    from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
    from flwr.supernode.fleet_http_client import FleetHttpClient
    from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
except ImportError as error:
    require("fleet")
    raise UserError(
        f"this version of flwr does not fit ({error}); install the one that does: pip install 'fleetgym[fleet]'"
    ) from error

HEARTBEAT_SECONDS = 10.0
"""A robot that was silent for twice as long counts as gone; Flower allows no less."""
POLL_SECONDS = 0.2
"""How often a robot asks for work."""
BODY_LIMIT = 64 * 2**20
"""Largest body of one HTTP request. Flower cuts arrays into chunks of at most 20 MB, so this bounds no policy."""
_OPEN = "/v1/fleet/"
_WHO = "/fleetgym"


class _Door:
    """The ASGI application in front of the SuperLink's: Fleet API only, bodies of bounded size, bytes counted."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.received = self.sent = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http" or not scope["path"].startswith(_OPEN):
            known = scope["type"] == "http" and scope["path"] == _WHO
            await self._answer(send, 200 if known else 404, json.dumps({"fleetgym": "fleet server"} if known else {}))
            return
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit() or int(length) > BODY_LIMIT:
            await self._answer(send, 413, "{}")
            return

        async def counted_receive() -> Any:
            event = await receive()
            self.received += len(event.get("body", b""))
            return event

        async def counted_send(event: Any) -> None:
            self.sent += len(event.get("body", b""))
            await send(event)

        await self.app(scope, counted_receive, counted_send)

    @staticmethod
    async def _answer(send: Any, status: int, text: str) -> None:
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text.encode()})


class LinkGrid(Grid):
    """Flower's ``Grid`` over a link state in this process.

    Unlike Flower's in-memory grid it also serves robots that come over the network, and unlike its HTTP grid it never
    waits: a reply whose body is still on its way is given by a later ``pull_messages``.
    """

    def __init__(self, state: Any, door: _Door) -> None:
        self._state, self._door = state, door
        who = (NOOP_FEDERATION_ID, None, NOOP_FLWR_AID, TaskType.SERVER_APP)
        run_id = state.create_run(None, None, None, {}, *who)
        self._run = state.get_run_info(run_ids=[run_id])[0]
        self._task = self._run.primary_task_id
        if not (state.claim_task(self._task) and state.activate_task(self._task)):
            raise RuntimeError("Flower's link state did not start the run")
        # What Flower stamps on the messages that this process makes.
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = run_id, SUPERLINK_NODE_ID, self._task
        self._incoming: dict[str, tuple[Message, list[str]]] = {}

    @property
    def run(self) -> Run:
        """Information about the one run of this server."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Does nothing: the run is made with the grid."""

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Flower's deprecated way to make a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """The nodes that are online."""
        self._state.acknowledge_task_heartbeat(self._task)  # or Flower takes this server for dead
        found = self._state.get_nodes(self._run.run_id)
        return self._state.get_node_info(node_ids=sorted(found))

    def get_node_ids(self) -> Iterable[int]:
        """Ids of the nodes that are online."""
        return [node.node_id for node in self.get_nodes()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Puts messages where their nodes fetch them; an empty id for a node that is gone."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
            with no_object_id_recompute():
                objects, tree = get_all_nested_objects(message), get_object_tree(message)
            session = self._state.start_session(self._run.run_id)
            stored, wanted = self._state.store_message_and_object_tree(
                remove_content_from_message(message), tree, session
            )
            for name in wanted if stored else ():
                self._state.store_object(self._run.run_id, session, name, objects[name].deflate())
            ids.append(message.metadata.message_id if stored else "")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies to these messages that are complete and were not given before."""
        state, wanted = self._state, {name for name in message_ids if name}
        # A copy: Flower takes out what it answers itself, such as messages to a node that has gone.
        for reply in state.get_message_res(message_ids=set(wanted), run_id=self._run.run_id) if wanted else ():
            parts = []
            if not reply.has_error():
                tree = state.object_store.get_object_tree(reply.metadata.message_id)
                parts = [part.object_id for part in iterate_object_tree(tree)]
            self._incoming[reply.metadata.reply_to_message_id] = (reply, parts)
        complete = []
        for name in sorted(wanted & set(self._incoming)):
            reply, parts = self._incoming[name]
            contents = {part: state.get_object(self._run.run_id, part) for part in parts}
            if not all(contents.values()):
                continue  # still being sent; if its sender died on the way, the round's time limit says so
            del self._incoming[name]
            if parts:
                own = reply.metadata.message_id
                try:
                    reply = inflate_object_from_contents(own, contents)
                except Exception as error:  # whatever a robot sends, only its own reply is lost
                    refusal = Error(ErrorCode.REPLY_MESSAGE_UNAVAILABLE, f"unreadable reply: {error}")
                    reply = make_message(metadata=reply.metadata, error=refusal)
                reply.metadata.__dict__["_message_id"] = own
                state.object_store.delete(own)
            state.delete_messages(message_ins_ids={name})
            complete.append(reply)
        return complete

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Pushes messages and waits for their replies, ``timeout`` seconds at most."""
        pending, replies = {name for name in self.push_messages(messages) if name}, []
        end = None if timeout is None else time.monotonic() + timeout
        while pending and (end is None or time.monotonic() < end):
            found = list(self.pull_messages(pending))
            replies += found
            pending -= {reply.metadata.reply_to_message_id for reply in found}
            if not found:
                time.sleep(POLL_SECONDS / 2)
        return replies

    def traffic(self) -> tuple[int, int]:
        """Bytes of HTTP bodies sent to and received from all robots until now, polls and heartbeats included."""
        return self._door.sent, self._door.received


def parse_address(address: str) -> tuple[str, int]:
    """Splits ``host:port``; an IPv6 host stands in brackets.

    Raises:
        UserError: It is something else.
    """
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"address {address!r}: HOST:PORT is wanted, such as 127.0.0.1:9092 or robots.example.org:9092")
    return host, int(port)


def read_file(path: Path, what: str, option: str) -> bytes:
    """Reads a certificate or key.

    Raises:
        UserError: It cannot be read; the message names the option.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{option} {path}: {what} cannot be read ({error.strerror}); give the path of a file") from None


def public_keys(folder: Path, option: str = "--robot-keys") -> dict[str, bytes]:
    """Reads robots' public keys: each ``NAME.pub`` is an OpenSSH ECDSA key, as ``ssh-keygen -t ecdsa`` writes it.

    Returns:
        For each robot's name its key as PEM.

    Raises:
        UserError: No folder, no key in it, a file that is not such a key, or one key under two names.
    """
    files = sorted(folder.glob("*.pub")) if folder.is_dir() else []
    if not files:
        raise UserError(f"{option} {folder}: a folder with a NAME.pub for each robot is wanted (`ssh-keygen -t ecdsa`)")
    keys: dict[str, bytes] = {}
    for file in files:
        try:
            key = load_ssh_public_key(read_file(file, "the public key", option))
        except (ValueError, UnsupportedAlgorithm):
            key = None
        if not isinstance(key, ec.EllipticCurvePublicKey):
            raise UserError(f"{option} {file} is not an ECDSA public key; make one with `ssh-keygen -t ecdsa -b 384`")
        pem = public_key_to_bytes(key)
        if pem in keys.values():
            raise UserError(f"{option} {file} holds the key of another robot too; every robot needs its own")
        keys[file.stem] = pem
    return keys


def private_key(path: Path, option: str = "--key") -> ec.EllipticCurvePrivateKey:
    """Reads a robot's private key, an OpenSSH ECDSA key without passphrase.

    Raises:
        UserError: It cannot be read or is something else.
    """
    data = read_file(path, "the private key", option)
    try:
        key = load_ssh_private_key(data, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise UserError(
            f"{option} {path} is not an ECDSA private key without passphrase; make one with "
            "`ssh-keygen -t ecdsa -b 384 -N '' -f FILE`"
        )
    return key


def check_server_certificate(certificate: Path, key: Path) -> None:
    """Checks that a server can speak TLS with these files.

    Raises:
        UserError: One cannot be read, or they do not belong together.
    """
    read_file(certificate, "the certificate", "--certificate")
    read_file(key, "the certificate's private key", "--certificate-key")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key, lambda: b"")
    except (ssl.SSLError, ValueError) as error:
        raise UserError(
            f"--certificate {certificate} and --certificate-key {key} do not make a TLS server ({error}); a PEM "
            "certificate and its private key without passphrase are wanted"
        ) from None


@contextlib.contextmanager
def serve(
    address: str,
    *,
    certificate: Path | None = None,
    certificate_key: Path | None = None,
    robot_keys: dict[str, bytes] | None = None,
) -> Iterator[tuple[LinkGrid, dict[int, str]]]:
    """Serves Flower's Fleet API until the block ends.

    Args:
        address: ``host:port`` to listen on.
        certificate: PEM file with the server's certificate (chain); TLS is spoken if it is given.
        certificate_key: PEM file with its private key.
        robot_keys: Names and public keys of the robots that may take part; anybody if None.

    Yields:
        The grid, and the robot's name of each node whose key is known.

    Raises:
        UserError: The port is taken or the address is not this machine's.
    """
    import uvicorn  # the server's half of Flower is as slow to import as torch, and robots do not need it
    from flwr.superlink.main import create_app

    host, port = parse_address(address)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    try:
        listener = socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=256
        )
    except OSError as error:
        raise UserError(f"--listen {address}: {error.strerror or error}; choose another address or port") from None
    app = create_app()
    app.state.enable_supernode_auth = robot_keys is not None
    state = app.state.linkstate_factory.state()
    names = {
        state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, pem, HEARTBEAT_SECONDS): name
        for name, pem in (robot_keys or {}).items()
    }
    door = _Door(app)
    secure = {"ssl_certfile": str(certificate), "ssl_keyfile": str(certificate_key)} if certificate else {}
    config = uvicorn.Config(door, log_level="error", access_log=False, ws="none", timeout_graceful_shutdown=2, **secure)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        if not thread.is_alive():
            raise RuntimeError("the server's thread ended before it listened")
        time.sleep(0.02)
    try:
        yield LinkGrid(state, door), names
    finally:
        server.should_exit = True
        thread.join(timeout=10)


def knock(address: str, root_certificate: Path | None) -> None:
    """Asks once whether a fleet server is at an address.

    Args:
        address: ``host:port``.
        root_certificate: PEM file of the authority that the server's certificate must come from; no TLS if None.

    Raises:
        UserError: Something answers that is not a fleet server, or whose certificate does not convince; trying again
            would not help.
        OSError: Nothing answers; trying again may help.
    """
    host, port = parse_address(address)
    tls = root_certificate is not None
    if tls:
        context = ssl.create_default_context(cafile=str(root_certificate))
        connection: Any = http.client.HTTPSConnection(host, port, timeout=5, context=context)
    else:
        connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", _WHO)
        answer = connection.getresponse()
        said = answer.read(1000)
    except ssl.SSLCertVerificationError as error:
        raise UserError(
            f"the server at {address} has a certificate that does not convince ({error.verify_message}); give the "
            "certificate of its authority with --root-certificate, and the host's name as the certificate has it"
        ) from None
    except ssl.SSLError as error:
        raise UserError(
            f"the server at {address} does not speak TLS ({error.reason}); is it without --certificate?"
        ) from None
    except (http.client.HTTPException, ConnectionResetError) as error:
        if tls:
            raise
        raise UserError(
            f"what answers at {address} does not speak plain HTTP ({error}); with TLS, give --root-certificate"
        ) from None
    finally:
        connection.close()
    if answer.status != 200 or b"fleet server" not in said:
        raise UserError(f"what answers at {address} is not a fleet server (HTTP {answer.status})")


class _Session:
    """One robot's connection: registered, kept alive from a thread, and a way to get messages and send replies."""

    def __init__(self, address: str, root: Path | None, key: ec.EllipticCurvePrivateKey | None) -> None:
        self._own = key is None
        private, public = generate_key_pairs() if key is None else (key, key.public_key())
        self._public = public_key_to_bytes(public)
        verify = root.read_bytes() if root else None
        signed = [RuntimeVersionHttpInterceptor(component_name="SuperNode"), NodeAuthHttpInterceptor(private, public)]
        self._client = FleetHttpClient.from_server_address(address, root is None, verify, interceptors=signed)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self.node: Any = None

    def __enter__(self) -> _Session:
        self._client.__enter__()
        if self._own:
            self._client.RegisterNode(RegisterNodeFleetRequest(public_key=self._public))
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_SECONDS)
        self.node = Node(node_id=self._client.ActivateNode(request).node_id)
        self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stop.set()
        if self.node is not None:
            with contextlib.suppress(Exception):  # the server may be gone
                self._client.DeactivateNode(DeactivateNodeRequest(node_id=self.node.node_id))
        self._client.__exit__(None, None, None)

    def _beat(self) -> None:
        request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_SECONDS)
        while not self._stop.wait(HEARTBEAT_SECONDS / 2):
            with contextlib.suppress(Exception):  # the main thread notices a server that is gone
                self._client.SendNodeHeartbeat(request)

    def receive(self) -> Message | None:
        """The next message for this robot, complete, or None."""
        response = self._client.PullMessages(PullMessagesRequest(node=self.node))
        if not response.messages_list:
            return None
        message, tree = message_from_proto(response.messages_list[0]), response.message_object_trees[0]
        run_id, contents = message.metadata.run_id, {}
        for part in iterate_object_tree(tree):
            request = PullObjectRequest(node=self.node, run_id=run_id, object_id=part.object_id)
            got = self._client.PullObject(request)
            if not (got.object_found and got.object_available):
                raise ConnectionError("the server has dropped a message")
            contents[part.object_id] = got.object_content
        own = message.metadata.message_id
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(node=self.node, run_id=run_id, message_object_id=own)
        )
        message = inflate_object_from_contents(own, contents)
        message.metadata.__dict__["_message_id"] = own
        return message

    def send(self, reply: Message, seconds: float) -> None:
        """Sends a reply."""
        reply.metadata.__dict__["_message_id"] = reply.object_id
        with no_object_id_recompute():
            tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
        response = self._client.PushMessages(
            PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[tree],
                clientapp_runtime_list=[seconds],
            )
        )
        for name in response.objects_to_push:
            self._client.PushObject(
                PushObjectRequest(
                    node=self.node, run_id=reply.metadata.run_id, session_id=response.session_id, object_id=name,
                    object_content=objects[name].deflate(),
                )
            )  # fmt: skip


def work(
    address: str,
    app: ClientApp,
    done: Callable[[], bool],
    *,
    root_certificate: Path | None = None,
    key: ec.EllipticCurvePrivateKey | None = None,
    wait: float = 60.0,
    say: Callable[[str], None] = print,
) -> None:
    """Connects to a fleet server and answers its messages with a ClientApp, in this process, until ``done()``.

    A connection that is lost is made again, under a new node id, for ``wait`` seconds at a time.

    Args:
        address: ``host:port`` of the server.
        app: Answers messages. What it raises goes to the server as Flower's error reply, a UserError too.
        done: Asked after every reply.
        root_certificate: See :func:`knock`.
        key: The robot's private key, for a server that knows its robots.
        wait: Seconds to try to reach the server, at the start and after a loss.
        say: Takes a line about each connection made and lost.

    Raises:
        UserError: Unreachable for ``wait`` seconds, a wrong certificate, or a key that the server does not know.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    for name in ("httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    began = time.monotonic()
    last = "nothing answers"
    while not done():
        if time.monotonic() - began > wait:
            raise UserError(
                f"no fleet server at {address} within {wait:g} s ({last}); check the address, or start it first: "
                "fleetgym fleet server"
            )
        try:
            knock(address, root_certificate)
            with _Session(address, root_certificate, key) as session:
                say(f"connected to {address}")
                while not done():
                    message = session.receive()
                    began = time.monotonic()
                    if message is None:
                        time.sleep(POLL_SECONDS)
                        continue
                    reply = _answer(app, message, session.node.node_id, say)
                    session.send(reply, time.monotonic() - began)
                    began = time.monotonic()
        except (httpx.HTTPError, OSError) as error:
            refused = isinstance(error, httpx.HTTPStatusError)
            last = _reason(error)
            if refused and key is not None and "activate-node" in str(error.request.url):
                last = "the server does not know this robot's key, or still counts it as connected"
            elif refused and "register-node" in str(error.request.url):
                raise UserError(
                    f"the server at {address} takes only robots whose keys it knows; give this robot's with --key"
                ) from None
            say(f"no connection to {address}: {last}; trying again")
            time.sleep(1.0)


def _reason(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"HTTP {error.response.status_code}"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _answer(app: ClientApp, message: Message, node_id: int, say: Callable[[str], None]) -> Message:
    """The app's reply; Flower's error reply where it raises."""
    context = Context(message.metadata.run_id, node_id, {}, RecordDict(), {})
    try:
        return app(message, context)
    except Exception as error:
        say(f"error: {error}")
        text = f"{type(error).__name__}: {error}"
        return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, text[:500]), reply_to=message)


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
