#!/usr/bin/env bash
# pyarrow reads an S3 object that is replaced meanwhile at the size of the one before, without an error.
#
# Seen with pyarrow 25.0.1 against moto 5.2.5 on Python 3.11, 30 November 2026. open_input_stream asks for the size,
# read() for so many bytes. Where another object has taken the place in between, a longer one is cut off, and a shorter
# one is followed by whatever was in the buffer:
#     longer:  b'[1,'
#     shorter: b'[1]\x00\x00\x00\x00\x00\x11'
# So compare sizes once more after reading, or read what can tell by itself that it is whole, and read again.
# Exits 0 while this is so.
set -euo pipefail
folder=$(mktemp -d); trap 'kill "$server" 2>/dev/null || true; rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip --quiet --disable-pip-version-check install -q pyarrow==25.0.1 'moto[s3,server]==5.2.5' boto3
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export AWS_ACCESS_KEY_ID=test AWS_SECRET_ACCESS_KEY=test AWS_DEFAULT_REGION=us-east-1
export AWS_EC2_METADATA_DISABLED=true AWS_ENDPOINT_URL="http://127.0.0.1:$port"
venv/bin/python -m moto.server -p "$port" >/dev/null 2>&1 &
server=$!
for _ in $(seq 100); do (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null && break; sleep 0.2; done

cat > replace.py <<'PY'
import boto3
from pyarrow.fs import FileSystem

client = boto3.client("s3")
client.create_bucket(Bucket="bucket")
files, key = FileSystem.from_uri("s3://bucket/object")

def read_while(before, after):
    client.put_object(Bucket="bucket", Key="object", Body=before)
    with files.open_input_stream(key) as stream:
        client.put_object(Bucket="bucket", Key="object", Body=after)
        return stream.read()

longer, shorter = read_while(b"[1]", b"[1, 2, 3]"), read_while(b"[1, 2, 3]", b"[1]")
print("longer: ", longer)
print("shorter:", shorter)
if longer != b"[1," or len(shorter) != 9:
    raise SystemExit("changed: the object that is read is a whole one")
PY
venv/bin/python replace.py
