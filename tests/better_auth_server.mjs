// A Better Auth server for test_better_auth.py: e-mail and password, the JWT plugin, accounts in
// memory, and what docs/frontend.md does before an account is deleted. It takes the plugin's options
// as JSON, prints its origin, and serves until it is killed.

import { createServer } from "node:http";

import { betterAuth } from "better-auth";
import { memoryAdapter } from "better-auth/adapters/memory";
import { toNodeHandler } from "better-auth/node";
import { jwt } from "better-auth/plugins";

import { beforeDelete } from "./before_delete.mjs";

const options = JSON.parse(process.argv[2]);
const server = createServer();

server.listen(0, "127.0.0.1", () => {
  const origin = `http://127.0.0.1:${server.address().port}`;
  process.env.BETTER_AUTH_URL = origin;
  const auth = betterAuth({
    baseURL: origin,
    secret: "guards-nothing-but-accounts-of-a-test",
    database: memoryAdapter({ user: [], session: [], account: [], verification: [], jwks: [] }),
    emailAndPassword: { enabled: true },
    user: { deleteUser: { enabled: true, beforeDelete } },
    plugins: [jwt(options)],
    rateLimit: { enabled: false },
    telemetry: { enabled: false },
  });
  server.on("request", toNodeHandler(auth));
  console.log(origin);
});
