"""Checks of the addresses of servers."""

import ipaddress
import re
from urllib.parse import urlsplit

from megatron_brain.errors import ConfigError


def require_address(key: str, url: str, *, example: str) -> None:
    """Check that requests can be sent to an address: its scheme, host and port.

    Args:
        key: name of the setting, for the error.
        url: one address.
        example: what an address looks like.

    Raises:
        ConfigError: names the address, what is wrong with it, and the example.
    """
    try:
        wrong = _mistake(url)
    except ValueError as error:  # What is wrong with brackets, a port, an IP address or a long name.
        wrong = str(error)
    if wrong:
        raise ConfigError(f"{key}={url}: is no address; write {example} ({wrong})")


def _mistake(url: str) -> str | None:
    if not url.startswith(("http://", "https://")):
        return "it does not begin with http:// or https://"
    if not url.isprintable() or " " in url:
        return "it holds white space or another character that no address has"
    parts = urlsplit(url)
    if not parts.hostname:
        return "it names no host"
    if "[" in parts.netloc:
        ipaddress.IPv6Address(parts.hostname)
    elif re.fullmatch(r"[0-9]+(\.[0-9]+){3}", parts.hostname):
        ipaddress.IPv4Address(parts.hostname)
    elif not parts.hostname.isascii():
        return "its host is not in ASCII"
    else:
        parts.hostname.encode("idna")
    return "port 0 is none" if parts.port == 0 else None
