// One inference over AIP1 with NetMQ. See docs/wire-protocol.md.
//
// NOT COMPILED BY THIS PROJECT'S TESTS: there is no .NET in its checks. Please report what does not work.
//
//   dotnet run -- tcp://127.0.0.1:5570 digits image 1,28,28,1 [FILE of raw little-endian float32]
//
// NetMQ's ipc:// is not libzmq's (it is a TCP port on loopback), so use tcp://.

using System;
using System.IO;
using System.Linq;
using System.Text;
using System.Text.Json;
using NetMQ;
using NetMQ.Sockets;

if (args.Length < 4)
{
    Console.Error.WriteLine("usage: Infer ENDPOINT MODEL TENSOR SHAPE [FILE]");
    return 1;
}
var timeout = TimeSpan.FromSeconds(2);
var shape = args[3].Split(',').Select(long.Parse).ToArray();
var count = (int)shape.Aggregate(1L, (product, size) => product * size);

byte[] input;
if (args.Length > 4)
{
    input = File.ReadAllBytes(args[4]);
}
else
{
    input = new byte[count * sizeof(float)];
    Buffer.BlockCopy(Enumerable.Range(0, count).Select(i => (float)i).ToArray(), 0, input, 0, input.Length);
}

var header = JsonSerializer.SerializeToUtf8Bytes(new
{
    op = "infer",
    id = "1",
    model = args[1],
    ttl_ms = timeout.TotalMilliseconds,
    inputs = new[] { new { name = args[2], datatype = "FP32", shape, frame = 0 } },
});

var ok = false;
using (var socket = new DealerSocket())
{
    socket.Options.Linger = TimeSpan.Zero;
    socket.Connect(args[0]);

    var request = new NetMQMessage();
    request.Append("AIP1");
    request.Append(header);
    request.Append(input);
    var reply = new NetMQMessage();
    if (!socket.TrySendMultipartMessage(timeout, request) || !socket.TryReceiveMultipartMessage(timeout, ref reply))
    {
        Console.Error.WriteLine("no answer in time");
    }
    else
    {
        Console.WriteLine(reply![1].ConvertToString(Encoding.UTF8));
        using var answer = JsonDocument.Parse(reply[1].ToByteArray());
        ok = answer.RootElement.GetProperty("ok").GetBoolean();
        if (ok)
        {
            var bytes = reply[2].ToByteArray();
            var values = new float[bytes.Length / sizeof(float)];
            Buffer.BlockCopy(bytes, 0, values, 0, values.Length * sizeof(float));
            Console.WriteLine(string.Join(" ", values));
        }
    }
}
NetMQConfig.Cleanup(false);
return ok ? 0 : 1;
