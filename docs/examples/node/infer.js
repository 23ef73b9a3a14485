// One inference over AIP1 with zeromq.js. See docs/wire-protocol.md.
//
//   npm install
//   node infer.js tcp://127.0.0.1:5570 digits image 1,28,28,1 [FILE of raw little-endian float32]

import { readFileSync } from "node:fs";
import { Dealer } from "zeromq";

const [endpoint, model, tensor, shapeText, file] = process.argv.slice(2);
if (!shapeText) {
  console.error("usage: node infer.js ENDPOINT MODEL TENSOR SHAPE [FILE]");
  process.exit(1);
}
const shape = shapeText.split(",").map(Number);
const count = shape.reduce((product, size) => product * size, 1);
const input = file ? readFileSync(file) : Buffer.from(Float32Array.from({ length: count }, (_, i) => i).buffer);

const socket = new Dealer({ linger: 0, immediate: true, sendTimeout: 2000, receiveTimeout: 2000 });
socket.connect(endpoint);
try {
  const header = {
    op: "infer",
    id: "1",
    model,
    ttl_ms: 2000,
    inputs: [{ name: tensor, datatype: "FP32", shape, frame: 0 }],
  };
  await socket.send(["AIP1", JSON.stringify(header), input]);
  const [protocol, headerFrame, ...tensors] = await socket.receive();
  if (protocol.toString() !== "AIP1") throw new Error("this is no AIP1 reply");
  const reply = JSON.parse(headerFrame.toString());
  console.log(JSON.stringify(reply));
  if (!reply.ok) throw new Error(`${reply.code}: ${reply.message}`);
  for (const output of reply.outputs.filter((item) => item.datatype === "FP32")) {
    // slice copies: received frames have no alignment, and Float32Array needs 4 bytes
    const bytes = tensors[output.frame];
    const values = new Float32Array(bytes.buffer.slice(bytes.byteOffset, bytes.byteOffset + bytes.length));
    console.log(values.join(" "));
  }
} catch (error) {
  console.error(error.code === "EAGAIN" ? `no answer from ${endpoint} in time` : error.message);
  process.exitCode = 1;
} finally {
  socket.close();
}
