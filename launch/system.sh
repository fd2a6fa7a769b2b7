# shellcheck shell=bash
# Sourced, not run: `source launch/system.sh` and then `install_system_packages`.
#
# Installs what tests/multinode needs to make hosts and a Slurm on this machine, where that is possible: as root, with
# apt. Elsewhere those tests skip and say what is missing. No service is started.

install_system_packages() {
    local packages=(iproute2 openssh-client openssh-server pdsh slurm-wlm munge openmpi-bin)
    local package missing=() policy=/usr/sbin/policy-rc.d made_policy=
    for package in "${packages[@]}"; do
        dpkg -s "$package" >/dev/null 2>&1 || missing+=("$package")
    done
    if ((${#missing[@]} == 0)); then
        return
    fi
    if ((EUID != 0)) || ! command -v apt-get >/dev/null; then
        echo "== not root on Debian or Ubuntu: tests that need ${missing[*]} will be skipped"
        return
    fi
    echo "== installing ${missing[*]}"
    if [[ ! -e "$policy" ]]; then # Debian's packages would start sshd, munged and Slurm
        made_policy=yes
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    if ! { apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends \
        "${missing[@]}"; } >/dev/null; then
        echo "== apt could not install them: tests that need ${missing[*]} will be skipped"
    fi
    if [[ -n "$made_policy" ]]; then
        rm "$policy"
    fi
}
