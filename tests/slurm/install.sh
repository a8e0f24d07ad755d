#!/usr/bin/env bash
# Installs SLURM and munge for the tests of this folder where that is possible (Debian, Ubuntu, as root), and says in a
# sentence where it is not: the tests are skipped then. The services that the packages bring are not used or started.
set -euo pipefail

missing() { ! (PATH="$PATH:/usr/sbin" && command -v slurmctld && command -v slurmd && command -v munged && command -v sbatch) >/dev/null; }

if ! missing; then exit 0; fi
if ! command -v apt-get >/dev/null; then echo "SLURM is not installed: there is no apt-get here; its tests are skipped."; exit 0; fi
if [[ "$(id -u)" -ne 0 ]]; then echo "SLURM is not installed: that needs root; its tests are skipped."; exit 0; fi
export DEBIAN_FRONTEND=noninteractive
log="$(mktemp)"
# packages must not start daemons of their own
printf '#!/bin/sh\nexit 101\n' >"$log.policy"
if [[ ! -e /usr/sbin/policy-rc.d ]]; then
    install -m 755 "$log.policy" /usr/sbin/policy-rc.d
    trap 'rm -f /usr/sbin/policy-rc.d' EXIT
fi
(apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge) >"$log" 2>&1 || true
if missing; then
    echo "SLURM could not be installed, its tests are skipped; apt-get said: $(tail -n 1 "$log")"
else
    echo "SLURM is installed: $(sbatch --version)"
fi
rm -f "$log" "$log.policy"
