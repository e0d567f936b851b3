"""SCRAM authentication, with channel binding if the client supports it."""

import asyncio
import secrets

from scramp import ScramException, ScramMechanism
from trustme import LeafCert

from neon_proxy import wire

PLAIN, BOUND = "SCRAM-SHA-256", "SCRAM-SHA-256-PLUS"


async def passes_scram(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    password: str | None,
    certificate: LeafCert,
) -> bool:
    """Authenticate a client, and return whether its password is right. None: no password is.

    A client cannot distinguish a missing role from a wrong password.
    """
    writer.write(wire.ask_for_sasl(BOUND.encode(), PLAIN.encode()))
    _, body = await wire.read_message(reader)
    name, first = wire.read_sasl_choice(body)
    mechanism = ScramMechanism(name)
    secret = mechanism.make_auth_info(password or secrets.token_hex())
    binding = ("tls-server-end-point", certificate.cert_chain_pems[0].bytes().decode())
    # A server that offers the bound mechanism rejects clients that believe it does not (flag "y"),
    # so pass the binding for both mechanisms.
    exchange = mechanism.make_server(lambda _user: secret, channel_binding=binding)
    try:
        # libpq leaves the user empty, because the startup message contains it. RFC 5802 and scramp
        # do not allow that: let scramp parse a made-up user, but sign what was really sent.
        exchange.set_client_first(first.replace(",n=,", ",n=*,", 1))
        exchange.client_first_bare = exchange.client_first_bare.replace("n=*,", "n=,", 1)
        writer.write(wire.authentication(11, exchange.get_server_first().encode()))
        _, body = await wire.read_message(reader)
        exchange.set_client_final(body.decode())
    except ScramException:
        return False
    writer.write(wire.authentication(12, exchange.get_server_final().encode()))
    return True
