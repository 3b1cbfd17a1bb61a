"""An S3 server on this machine that asks for passwords."""

import contextlib
import os
import subprocess
import sys
import time
import urllib.request

from .processes import PATIENCE, end, free_port

# One request at a time: moto looks whether a condition holds, and then writes, where a store does both at once
SERVER = """
import sys, threading
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple

app, busy = DomainDispatcherApplication(create_backend_app), threading.Lock()

def one_at_a_time(environ, start_response):
    with busy:
        return [*app(environ, start_response)]

run_simple("127.0.0.1", int(sys.argv[1]), one_at_a_time, threaded=True)
"""


class Store:
    """moto's server, in a process of its own; `environment(user)` is what a program needs to reach it as that user.

    "owner" may do everything in all buckets, "guest" nothing. The bucket `shared` is there.
    """

    bucket = "s3://shared"

    def __init__(self, log):
        self.url = f"http://127.0.0.1:{free_port()}"
        self.log = open(log, "w")
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, self.url.rpartition(":")[2]], stdout=self.log, stderr=self.log,
            start_new_session=True)
        self._wait()
        self.keys = self._users()

    def _wait(self):
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/moto-api/"):
                return
            assert self.process.poll() is None
            time.sleep(0.05)

    def _users(self):
        iam, s3 = (self._client(name, "any", "any") for name in ("iam", "s3"))
        s3.create_bucket(Bucket="shared")
        keys = {}
        for name in ("owner", "guest"):
            iam.create_user(UserName=name)
            key = iam.create_access_key(UserName=name)["AccessKey"]
            keys[name] = key["AccessKeyId"], key["SecretAccessKey"]
        iam.put_user_policy(UserName="owner", PolicyName="all", PolicyDocument=(
            '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}'))
        asked = urllib.request.Request(f"{self.url}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
        with urllib.request.urlopen(asked):  # from now on everyone's rights count
            return keys

    def _client(self, service, key, secret):
        import boto3

        return boto3.client(service, endpoint_url=self.url, region_name="us-east-1", aws_access_key_id=key,
                            aws_secret_access_key=secret)

    def client(self):
        """boto3's own of the owner, which is none of ours."""
        return self._client("s3", *self.keys["owner"])

    def environment(self, user="owner"):
        key, secret = self.keys.get(user, (user, user))
        return {"AWS_ENDPOINT_URL": self.url, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret,
                "AWS_REGION": "us-east-1", "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull}

    def close(self):
        end([self.process])
        self.log.close()
