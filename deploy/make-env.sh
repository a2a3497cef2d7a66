#!/bin/sh
# Writes .env for docker-compose.yml, with keys that nobody else has. Never overwrites: the keys in an .env open what is stored.
set -eu
file="${1:-.env}"
if [ -e "$file" ]; then
  echo "$file exists, and its keys open what is stored: it stays as it is. To begin anew, remove it and the volumes." >&2
  exit 1
fi
command -v openssl >/dev/null || { echo "openssl is missing: install it, or fill in .env.example by hand." >&2; exit 1; }
umask 077
temporary="$file.new"
trap 'rm -f "$temporary"' EXIT
cat >"$temporary" <<END
NOTIFY_SEAL_KEY=$(openssl rand -base64 32)
NOTIFY_TOKEN_KEY=$(openssl rand -base64 32)
NOTIFY_POSTGRES_PASSWORD=$(openssl rand -hex 24)
REGISTRY_POSTGRES_PASSWORD=$(openssl rand -hex 24)
S3_ACCESS_KEY=$(openssl rand -hex 10)
S3_SECRET_KEY=$(openssl rand -hex 20)
END
mv "$temporary" "$file"
echo "$file is written, for you alone to read. Keep a copy of it: without NOTIFY_SEAL_KEY no stored contact can be opened." >&2
