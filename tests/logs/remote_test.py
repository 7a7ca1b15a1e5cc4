"""Every transport passes the suite of `remote_conformance`."""

import contextlib
import functools

import pytest

from moetion_jax.logs import zmq_client, zmq_server
from tests.support import remote_conformance, tcp_transport

_SECRET = b'0123456789abcdef'
_TRANSPORTS = {
  'zmq': (zmq_client.StoreClient, zmq_server.StoreServer),
  'curve': (
    functools.partial(zmq_client.StoreClient, secret=_SECRET),
    functools.partial(zmq_server.StoreServer, secret=_SECRET),
  ),
  'sockets': (tcp_transport.Client, tcp_transport.Server),
}


@pytest.fixture(params=_TRANSPORTS)
def transport(request):
  return _TRANSPORTS[request.param]


class TestEveryTransport(remote_conformance.RemoteConformance):
  @pytest.fixture
  def host(self, transport):
    host = remote_conformance.Host(transport[1])
    yield host
    host.close()

  @pytest.fixture
  def connect(self, transport):
    with contextlib.ExitStack() as closing:

      def connect(resend_seconds=0.2, worker=remote_conformance.ME):
        client = transport[0](worker, resend_seconds)
        closing.callback(client.close)
        return client

      yield connect
