"""An S3 server on loopback (seaweedfs), which tests kill; `s3_server.py FOLDER COMMAND` runs one beside a command."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

KEY, SECRET = "taskfuse-test", "not-so-secret"
WEED = Path(sys.executable).parent / "weed"


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, each with 10,000 more free too: seaweedfs listens there with gRPC."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            if 12000 < port < 50000 and port not in found:
                try:
                    other.bind(("127.0.0.1", port + 10000))
                except OSError:
                    continue
                found.append(port)
    return found


class S3Server:
    """A server of one bucket, `bucket`; its data survive kill() and start().

    Attributes:
        env: with which any S3 client finds it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = free_ports(4)
        self.url = f"http://127.0.0.1:{self.ports[3]}"
        self.env = {
            "AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        identity = {"name": "test", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> "S3Server":
        """Starts it and waits until it answers, and its bucket is there."""
        master, volume, filer, s3 = self.ports
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [WEED, "server", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-master.port={master}",
                 f"-volume.port={volume}", "-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}",
                 f"-s3.config={self.folder / 's3.json'}", "-master.volumeSizeLimitMB=64", "-volume.max=40",
                 # Of fixed ports, for which a second server on the machine would end.
                 "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false",
                 "-master.electionTimeout=500ms", "-master.heartbeatInterval=100ms"],  # 2.5 s to be there again, not 14
                stdout=log, stderr=log,
            )  # fmt: skip
        import botocore.session
        from botocore.config import Config

        client = botocore.session.get_session().create_client(
            "s3", endpoint_url=self.url, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1",
            config=Config(connect_timeout=2, read_timeout=5, retries={"max_attempts": 1}),
        )  # fmt: skip
        end = time.monotonic() + 60
        while True:
            try:
                names = [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]
                if "bucket" not in names:
                    client.create_bucket(Bucket="bucket")
                client.put_object(Bucket="bucket", Key="ready", Body=b"")  # needs a volume
                return self
            except Exception as error:
                if time.monotonic() > end or self.process.poll() is not None:
                    raise RuntimeError(f"seaweedfs does not answer: {error}; see {self.folder / 'log'}") from None
                time.sleep(0.2)

    def kill(self) -> None:
        """Ends it as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def main() -> int:
    """Runs a command with a server beside it; without one, prints what a shell exports and runs until stdin closes."""
    folder, *command = sys.argv[1:]
    server = S3Server(Path(folder).absolute())
    try:
        server.start()
        if command:
            code = subprocess.call(command, env={**os.environ, **server.env})
            again = f"{os.path.relpath(sys.executable)} {sys.argv[0]} {folder} COMMAND"
            print(f"The S3 server ends, its data stay: {again} runs another command beside it.")
            return code
        print("\n".join(f"export {name}={value}" for name, value in server.env.items()), flush=True)
        sys.stdin.read()
        return 0
    finally:
        server.kill()


if __name__ == "__main__":
    sys.exit(main())
