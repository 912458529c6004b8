"""What a Ray that this project starts for itself gets in its environment."""

import secrets


def own_ray() -> dict[str, str]:
    """Variables by name, for a process that has none of them."""
    return {
        # A token of this process's own, which Ray reads once: else it writes one to the home folder, and clusters
        # started there later ask their users for it.
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        # Ray's processes of a killed driver, and a driver whose Ray was killed, wait so long before they end.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    }
