// What a front end does, in the words of the client that @hey-api/openapi-ts made of the schema.
import { createTask, deleteTask, listTasks, login, register } from "./client";
import { client } from "./client/client.gen";

declare const process: { argv: string[] };

async function main(): Promise<void> {
  const throwOnError = true;
  const [baseUrl, email] = process.argv.slice(2);
  const password = "correct horse battery staple";
  client.setConfig({ baseUrl });
  await register({ body: { email, password, name: "Grace" }, throwOnError });
  const { data: tokens } = await login({ body: { username: email, password }, throwOnError });
  client.setConfig({ auth: tokens.access_token });

  const { data: task } = await createTask({ body: { title: "Call it" }, throwOnError });
  const { data: before } = await listTasks({ query: { completed: false }, throwOnError });
  await deleteTask({ path: { task_id: task.id }, throwOnError });
  const { data: after } = await listTasks({ throwOnError });
  const { error } = await deleteTask({ path: { task_id: task.id } });

  const titles = before.map((one) => one.title);
  console.log(JSON.stringify({ titles, left: after.length, error: error?.detail }));
}

main();
