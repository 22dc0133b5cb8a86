--- The admin API: docs/admin-api.md, call by call.
--
-- Why: the one place that knows HTTP. It authenticates, reads and checks; what is to be done is
-- the business of `store`, `lease` and `site`.

local certificates = require "tidegate.certificates"
local codec = require "tidegate.codec"
local ffi = require "ffi"
local json = require "tidegate.json"
local lease = require "tidegate.lease"
local live = require "tidegate.live"
local members = require "tidegate.members"
local metrics = require "tidegate.metrics"
local persist = require "tidegate.persist"
local posix = require "tidegate.posix"
local probe = require "tidegate.probe"
local process = require "ngx.process"
local records = require "tidegate.records"
local site = require "tidegate.site"
local store = require "tidegate.store"
local wire = require "tidegate.wire"

local ctl = ngx.shared.tidegate_ctl

local bit = require "bit"
local bor, bxor = bit.bor, bit.bxor
local byte = string.byte
local cast = ffi.cast
local find = string.find
local ffi_string = ffi.string
local floor = math.floor
local gsub = string.gsub
local ipairs = ipairs
local match = string.match
local ngx = ngx
local now = ngx.now
local pairs = pairs
local sub = string.sub
local tostring = tostring
local type = type

local BUSY_PAUSE = 1
local MAX_ERRORS = 100
local CHUNK = 65536     -- bytes of a long answer that are put together before they are sent
local TOKEN_AGE = 5     -- seconds after which the token's file is read again

local WRITER_RULE = "expected 1 to 128 printable ASCII characters"

local _M = {}

local settings          -- {token, token_file, status_password, version, features}
local token_read_at = 0


--- Sets what does not change while a configuration is in force.
-- @param options `{token, token_file, status_password, version, features}`; no token and no file:
--   no authentication
function _M.configure(options)
    settings = options
end


-- Answers with a value, or with text that is JSON already. What refuses a call returns this, so
-- that its caller gets nil.
local function send(status, value)
    local text = type(value) == "string" and value or json.encode(value)
    ngx.status = status
    ngx.header["Content-Type"] = "application/json"
    ngx.header["Content-Length"] = #text + 1
    ngx.print(text, "\n")
    return nil
end


local function refuse(status, code, message, more)
    local value = { error = code, message = message }
    for key, item in pairs(more or {}) do
        value[key] = item
    end
    return send(status, value)
end


local function busy()
    ngx.header["Retry-After"] = BUSY_PAUSE
    return refuse(503, "busy", "another change is being applied; try again")
end


-- Reads the token's file again once in a while, so that a new secret needs no restart.
local function expected_token()
    if settings.token_file and now() - token_read_at > TOKEN_AGE then
        token_read_at = now()
        local text = posix.read(settings.token_file)
        text = text and gsub(text, "%s+$", "")
        if text and text ~= "" then
            settings.token = text
        end
    end
    return settings.token
end


-- Compares in a time that depends on the length of what was sent alone.
local function equal(sent, expected)
    local difference = bxor(#sent, #expected)
    for index = 1, #sent do
        difference = bor(difference, bxor(byte(sent, index),
                                          byte(expected, (index - 1) % #expected + 1)))
    end
    return difference == 0
end


-- What follows the name of the scheme in the Authorization header; nil for another scheme.
local function credentials(pattern)
    local header = ngx.req.get_headers()["authorization"]
    return type(header) == "string" and match(header, pattern) or nil
end


local function authorized()
    local expected = expected_token()
    local sent = expected and credentials("^[Bb]earer +(.+)$")
    return not expected or sent ~= nil and equal(sent, expected)
end


-- The password of HTTP basic authentication, of whatever user; nil where there is none.
local function basic_password()
    local sent = credentials("^[Bb]asic +(.+)$")
    local pair = sent and ngx.decode_base64(sent)
    return pair and match(pair, "^[^:]*:(.*)$")
end


-- The body as a JSON object; answers and gives nil where it is none.
local function read_object()
    ngx.req.read_body()
    local text = ngx.req.get_body_data()
    if not text then
        local file = ngx.req.get_body_file()
        text = file and posix.read(file) or ""
    end
    local value, err = json.decode(text)
    if type(value) ~= "table" or #value > 0 or not find(text, "^%s*{") then
        return refuse(400, "bad_json", "the body is not a JSON object: "
                      .. (err or "it is " .. (type(value) == "table" and "a list" or type(value))))
    end
    return value
end


local function invalid(errors)
    local list = json.array(errors)
    local first = list[1]
    local message = #list == 1 and "1 fault" or #list .. " faults"
    if first then
        message = message .. "; the first: "
            .. (first.upstream and "upstream " .. tostring(first.upstream) .. ": " or "")
            .. first.field .. " " .. first.message
    end
    return refuse(422, "invalid", message, { errors = list })
end


-- Takes the lease for the writer of a push; answers and gives nil where that fails.
local function take_lease(writer)
    if not wire.is_writer(writer) then
        return invalid({ { field = "writer", message = WRITER_RULE } })
    end
    local expires_in, holder, left = lease.take(writer)
    if not expires_in then
        return refuse(423, "lease_held", "writer " .. holder .. " holds the lease",
                      { writer = holder, expires_in = left })
    end
    return expires_in
end


-- What this build can do that not every build can; a part that works has noted it itself.
local function features()
    local list = json.array()
    for index, name in ipairs(settings.features) do
        list[index] = name
    end
    if ctl:get("stream") then
        list[#list + 1] = "stream"
    end
    return list
end


local function get_status()
    local summary = store.summary()
    local writer, expires_in = lease.holder()
    local version = ngx.config.nginx_version
    local lua = ngx.config.ngx_lua_version
    return send(200, {
        instance = ctl:get("instance"),
        revision = summary.revision,
        generation = site.generation(),
        writer = writer,
        lease_expires_in = expires_in,
        upstreams = summary.upstreams,
        peers = summary.peers,
        source = summary.source,
        persisted_revision = ctl:get("persisted_revision") or 0,
        dict = { capacity_bytes = summary.capacity, free_bytes = summary.free },
        versions = {
            tidegate = settings.version,
            nginx = floor(version / 1000000) .. "." .. floor(version / 1000) % 1000 .. "."
                .. version % 1000,
            ngx_lua = floor(lua / 1000000) .. "." .. floor(lua / 1000) % 1000 .. "." .. lua % 1000,
        },
        nginx_version = version,
        features = features(),
        certificates_serial = certificates.serial(),
        workers = ngx.worker.count(),
        master_pid = process.get_master_pid(),
        started_at = ctl:get("started_at"),
    })
end


local function get_membership()
    ngx.header["Content-Type"] = "application/json"
    ngx.print('{"revision":', tostring(ctl:get("revision") or 0), ',"upstreams":{')
    local names, parts, size, first = {}, {}, 0, true
    for index, name in ipairs(store.names()) do
        names[index] = name
    end
    table.sort(names)
    for _, name in ipairs(names) do
        local blob = store.get(name)
        if blob then
            local part = (first and "" or ",") .. json.quote(name) .. ":"
                .. wire.show_upstream(name, codec.decode(blob))
            first = false
            parts[#parts + 1] = part
            size = size + #part
            if size > CHUNK then
                ngx.print(parts)
                parts, size = {}, 0
            end
        end
        store.breathe()
    end
    ngx.print(parts, "}}\n")
end


-- What a writer that comes back compares, instead of all the peers.
local function get_versions()
    local versions = {}
    for _, name in ipairs(store.names()) do
        local blob = store.get(name)
        local head = blob and codec.head(blob)
        if head then
            versions[name] = codec.version(blob, head)
        end
        store.breathe()
    end
    return send(200, { revision = ctl:get("revision") or 0, versions = versions })
end


local function get_upstream(name)
    local blob = store.get(name)
    if not blob then
        return refuse(404, "not_found", "there is no upstream " .. name)
    end
    return send(200, wire.show_upstream(name, codec.decode(blob)))
end


local function sorted(set)
    local list = json.array()
    for key in pairs(set) do
        list[#list + 1] = key
    end
    table.sort(list)
    return list
end


-- Both kinds of push; `full` is PUT.
-- The members of a body that may be large: the text of each where it is no table of upstreams.
-- Answers and gives nil where it is no object.
-- @param large name of the member that is left as it is
-- @return values by name; bytes, and where in them the large one begins and ends (nil: not there)
local function read_members(large)
    ngx.req.read_body()
    local text = ngx.req.get_body_data()
    local bytes, size, release = nil, 0, nil
    if text then
        bytes, size = cast("const uint8_t *", text), #text
    elseif ngx.req.get_body_file() then
        bytes, size, release = posix.map(ngx.req.get_body_file())
    end
    local next_member = bytes and members.read(bytes, 0, size, store.breathe)
    local values, from, to, err = {}, nil, nil, nil
    if next_member then
        local name, begins, ends
        repeat
            name, begins, ends = next_member()
            if name == large then
                from, to = begins, ends
            elseif name then
                values[name], err = json.decode(ffi_string(bytes + begins, ends - begins))
            else
                err = begins
            end
        until not name or err
    end
    if not next_member or err then
        return refuse(400, "bad_json", "the body is not a JSON object"
                      .. (err and ": " .. err or ""))
    end
    return values, { bytes = bytes, text = text, from = from, to = to, release = release }
end


-- The upstreams of a push, one after the other, as `store.apply` asks for them: after the first
-- fault there are none, and all others are looked for faults as well.
-- @param where as `read_members` gives it
-- @param push `{errors, unsupported, names}`: what is found in them is added
local function upstreams_of(where, push)
    local bytes = where.bytes
    local errors, names = push.errors, push.names
    local next_member = members.read(bytes, where.from, where.to, store.breathe)

    local function read(name, begins, ends)
        if names[name] then
            errors[#errors + 1] = { upstream = name, field = "name", message = "is there twice" }
            return nil
        end
        names[name] = true
        local item, err = json.decode(ffi_string(bytes + begins, ends - begins))
        if item == nil then
            push.malformed = err
            return nil
        end
        return wire.read_upstream(name, item, errors, push.unsupported)
    end

    return function()
        while #errors < MAX_ERRORS and not push.malformed do
            local name, begins, ends = next_member()
            if not name then
                push.malformed = begins
                return nil
            end
            local upstream = read(name, begins, ends)
            if #errors == 0 and not push.malformed then
                return name, upstream
            end
            store.breathe()
        end
        return nil
    end
end


local function read_removed(body, push)
    if body.remove == nil then
        return
    end
    local names, err = wire.read_names(body.remove)
    if not names then
        push.errors[#push.errors + 1] = { field = "remove", message = err }
        return
    end
    push.remove = names
end


-- Faults that show only when all upstreams have been read.
local function check_removed(push)
    for _, name in ipairs(push.remove) do
        if push.names[name] then
            push.errors[#push.errors + 1] = {
                upstream = name, field = "remove", message = "is in upsert too",
            }
        end
    end
    return #push.errors == 0 and not push.malformed
end


local function refuse_push(push)
    if push.malformed then
        return refuse(400, "bad_json", "the body is not a JSON object: " .. push.malformed)
    end
    return invalid(push.errors)
end


local function push_membership(full)
    local field = full and "upstreams" or "upsert"
    local body, where = read_members(field)
    if not body or not take_lease(body.writer) then
        return
    end
    local errors, unsupported = {}, {}
    local push = {
        errors = errors,
        unsupported = unsupported,
        names = {},
        remove = {},
        writer = body.writer,
        revision = body.revision,
        base_revision = not full and body.base_revision or nil,
    }
    if not wire.is_revision(body.revision) or body.revision == 0 then
        errors[1] = { field = "revision", message = "expected a whole number above 0" }
    end
    if not full and not wire.is_revision(body.base_revision) then
        errors[#errors + 1] = { field = "base_revision", message = "expected a whole number" }
    end
    if not where.from and not full then
        push.next = function() end
    elseif where.from and members.read(where.bytes, where.from, where.to, store.breathe) then
        push.next = upstreams_of(where, push)
    else
        errors[#errors + 1] = { field = field, message = "expected an object of upstreams" }
        push.next = function() end
    end
    if not full then
        read_removed(body, push)
    end
    push.complete = function()
        return check_removed(push)
    end
    if #errors > 0 then
        push.next()
        return refuse_push(push)
    end

    local result, refusal = store.apply(push)
    if where.release then
        where.release()
    end
    if not result then
        if refusal.kind == "incomplete" then
            return refuse_push(push)
        elseif refusal.kind == "busy" then
            return busy()
        elseif refusal.kind == "revision" then
            return refuse(409, "revision", "the current revision is " .. refusal.revision,
                          { revision = refusal.revision })
        end
        return refuse(507, "dict_full", "the shared dict has no room for this push; raise "
                      .. "TIDEGATE_DICT_SIZE", {
            free_bytes = refusal.free_bytes, needed_bytes = refusal.needed_bytes,
        })
    end
    probe.start(result.probing)
    persist.schedule()
    -- Before the answer: an upstream of the same name that comes next is another one.
    records.forget(result.removed_names)
    send(200, {
        revision = result.revision,
        upserted = result.upserted,
        removed = result.removed,
        unsupported = sorted(unsupported),
    })
    ngx.eof()
    metrics.forget(result.removed_names)
end


local function get_site()
    local generation, files = site.files()
    return send(200, { generation = generation, files = files })
end


-- Whether a file of a site may have this name: `.stream` is for nginx's stream part.
local function is_file_name(name)
    return type(name) == "string" and #name <= 255
        and (find(name, "^[a-z0-9_][a-z0-9._-]*%.conf$")
             or find(name, "^[a-z0-9_][a-z0-9._-]*%.stream$")) ~= nil
end


local function put_site()
    local body = read_object()
    if not body or not take_lease(body.writer) then
        return
    end
    local errors = {}
    if type(body.generation) ~= "string" or #body.generation ~= 64
            or not find(body.generation, "^[0-9a-f]+$") then
        errors[1] = { field = "generation", message = "expected 64 lower-case hex digits" }
    end
    if type(body.files) ~= "table" then
        errors[#errors + 1] = { field = "files", message = "expected an object of file texts" }
    else
        for name, text in pairs(body.files) do
            local shown = tostring(name)
            if not is_file_name(name) then
                errors[#errors + 1] = {
                    field = "files",
                    message = "has the name " .. sub(shown, 1, 80)
                        .. "; expected [a-z0-9_][a-z0-9._-]*.conf or .stream",
                }
            elseif type(text) ~= "string" or find(text, "%z") then
                errors[#errors + 1] = { field = "files." .. shown, message = "expected text" }
            end
            if #errors >= 100 then
                break
            end
        end
    end
    if #errors > 0 then
        return invalid(errors)
    end
    local result, refusal = site.apply(body.generation, body.files)
    if not result then
        if refusal.kind == "busy" then
            return busy()
        end
        return refuse(422, "site_refused", refusal.message, {
            stage = refusal.stage, file = refusal.file, line = refusal.line,
        })
    end
    return send(200, { generation = body.generation, reloaded = result == "reloaded" })
end


local function get_certificates()
    local serial = certificates.serial()
    local hosts, backends = certificates.report()
    return send(200, { serial = serial, hosts = hosts, backends = backends })
end


local function post_lease()
    local body = read_object()
    local expires_in = body and take_lease(body.writer)
    if expires_in then
        return send(200, { writer = body.writer, expires_in = expires_in })
    end
end


local function delete_lease()
    local body = read_object()
    if not body then
        return
    end
    if not wire.is_writer(body.writer) then
        return invalid({ { field = "writer", message = WRITER_RULE } })
    end
    lease.release(body.writer)
    return send(200, { writer = body.writer })
end


local function get_health()
    return send(200, { status = "ok" })
end


local function get_ready()
    local reason
    if (ctl:get("revision") or 0) == 0 then
        reason = "no membership has been pushed, and none was on disk"
    elseif site.generation() == "" then
        reason = "no site has been pushed, and none was on disk"
    end
    if reason then
        return send(503, { status = "not ready", reason = reason })
    end
    return send(200, { status = "ready" })
end


local function get_metrics()
    ngx.header["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8"
    metrics.print({
        generation = site.generation(),
        counts = live.counts,
        nginx = {
            active = ngx.var.connections_active,
            reading = ngx.var.connections_reading,
            waiting = ngx.var.connections_waiting,
            writing = ngx.var.connections_writing,
        },
    })
    certificates.print_metrics()
end


local OPEN_PATHS = {
    ["/healthz"] = { GET = get_health },
    ["/readyz"] = { GET = get_ready },
    ["/metrics"] = { GET = get_metrics },
}
local PATHS = {
    ["/v1/status"] = { GET = get_status },
    ["/v1/membership"] = {
        GET = get_membership,
        PATCH = function() return push_membership(false) end,
        PUT = function() return push_membership(true) end,
    },
    ["/v1/certificates"] = { GET = get_certificates },
    ["/v1/versions"] = { GET = get_versions },
    ["/v1/site"] = { GET = get_site, PUT = put_site },
    ["/v1/lease"] = { POST = post_lease, DELETE = delete_lease },
}
local UPSTREAM_PREFIX = "/v1/membership/"


--- Body of `content_by_lua` of the admin listener.
function _M.handle()
    local path = match(ngx.var.request_uri, "^[^?]*")
    local calls, argument = OPEN_PATHS[path], nil
    if not calls then
        if not authorized() then
            ngx.header["WWW-Authenticate"] = "Bearer"
            return refuse(401, "unauthorized", "the bearer token is missing or wrong")
        end
        calls = PATHS[path]
        if not calls and sub(path, 1, #UPSTREAM_PREFIX) == UPSTREAM_PREFIX
                and #path > #UPSTREAM_PREFIX then
            argument = ngx.unescape_uri(gsub(sub(path, #UPSTREAM_PREFIX + 1), "%+", "%%2B"))
            calls = { GET = get_upstream }
        end
    end
    if not calls then
        return refuse(404, "not_found", "there is no " .. path)
    end
    local method = ngx.req.get_method()
    local call = calls[method] or method == "HEAD" and calls.GET
    if not call then
        local allowed = {}
        for name in pairs(calls) do
            allowed[#allowed + 1] = name
        end
        table.sort(allowed)
        ngx.header["Allow"] = table.concat(allowed, ", ")
        return refuse(405, "method_not_allowed", path .. " takes " .. table.concat(allowed, ", "))
    end
    return call(argument)
end


--- Body of `access_by_lua` of /nginx_status: the password that is set for it, or the admin token.
-- Without either nobody gets it, on no listener.
function _M.guard_status()
    local password, token = settings.status_password, expected_token()
    if not password and not token then
        refuse(403, "no_password", "nobody may read this as long as neither "
               .. "TIDEGATE_STATUS_PASSWORD_FILE nor an admin token is set")
        return ngx.exit(ngx.HTTP_OK)
    end
    local sent = basic_password()
    if password and sent and equal(sent, password) or token and authorized() then
        return
    end
    ngx.header["WWW-Authenticate"] = 'Basic realm="nginx_status"'
    refuse(401, "unauthorized", "the password is missing or wrong")
    return ngx.exit(ngx.HTTP_OK)
end


--- Answers for nginx where it refused a body for its size.
function _M.too_large()
    return refuse(413, "too_large", "the body is larger than 64 MiB")
end


return _M
